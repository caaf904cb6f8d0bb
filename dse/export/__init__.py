"""Export design points as folders that transformers, vLLM, ONNX Runtime or OpenVINO load without `dse`.

Each is verified in its engine, in a new process.
"""

from dse.export.engine_check import EngineReport as EngineReport
from dse.export.engine_check import verify_export as verify_export
from dse.export.engine_folder import engine_pair as engine_pair
from dse.export.engine_folder import write_engine_folder as write_engine_folder
from dse.export.formats import EXPORT_FORMATS as EXPORT_FORMATS
from dse.export.formats import ExportFormat as ExportFormat
from dse.export.point_export import ExportResult as ExportResult
from dse.export.point_export import export_point as export_point
from dse.export.point_export import export_points as export_points
from dse.export.staging import ExportRequest as ExportRequest
from dse.export.staging import StagedExport as StagedExport
from dse.export.staging import stage as stage
from dse.export.verification import ReloadReport as ReloadReport
from dse.export.verification import verify_folders as verify_folders
