"""Export design points as folders that load without `dse`, verified by reloading them in a fresh process."""

from dse.callable_module import make_callable as _make_callable
from dse.export.point_export import ExportResult as ExportResult
from dse.export.point_export import export_point as export_point
from dse.export.point_export import export_points as export_points
from dse.export.staging import ExportRequest as ExportRequest
from dse.export.staging import StagedExport as StagedExport
from dse.export.staging import stage as stage
from dse.export.study_export import export as export
from dse.export.verification import ReloadReport as ReloadReport
from dse.export.verification import verify_folders as verify_folders

__all__ = [
    "ExportRequest",
    "ExportResult",
    "ReloadReport",
    "StagedExport",
    "export",
    "export_point",
    "export_points",
    "stage",
    "verify_folders",
]

_make_callable(__name__)
