"""Export design points as Hugging Face folders that load without `dse`; each is verified by reloading it in a new
process.
"""

from dse.export.point_export import ExportResult as ExportResult
from dse.export.point_export import export_point as export_point
from dse.export.point_export import export_points as export_points
from dse.export.staging import ExportRequest as ExportRequest
from dse.export.staging import StagedExport as StagedExport
from dse.export.staging import stage as stage
from dse.export.study_export import export_trials as export_trials
from dse.export.verification import ReloadReport as ReloadReport
from dse.export.verification import verify_folders as verify_folders
