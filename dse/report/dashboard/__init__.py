"""The live page of a study, on Plotly Dash: layout, figures and server. The only package that imports dash.

Importing this package does not import dash, which is optional: `serve_page` does.
"""

from __future__ import annotations

from dse.report.dashboard.snapshot import PendingTrial as PendingTrial
from dse.report.dashboard.snapshot import StudySnapshot as StudySnapshot
from dse.report.dashboard.snapshot import StudySource as StudySource
from dse.report.dashboard.snapshot import VolumeStep as VolumeStep
