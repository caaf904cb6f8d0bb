"""Engines: what executes a model when it is measured. Each runs in a worker process of its own interpreter."""

from dse.engines.doctor_checks import engine_checks as engine_checks
from dse.engines.engine import Engine as Engine
from dse.engines.engine import EngineAvailability as EngineAvailability
from dse.engines.engine import EngineFormat as EngineFormat
from dse.engines.engine import EngineSession as EngineSession
from dse.engines.engine import EngineSettings as EngineSettings
from dse.engines.engine import EngineWindow as EngineWindow
from dse.engines.engine import EngineWork as EngineWork
from dse.engines.engine import FolderWriter as FolderWriter
from dse.engines.engine_pair import EnginePair as EnginePair
from dse.engines.registry import ENGINES as ENGINES
from dse.engines.registry import engine_named as engine_named
from dse.engines.server import ResidentServer as ResidentServer
from dse.engines.server import Server as Server
from dse.engines.serving import PairedServing as PairedServing
from dse.engines.serving import measure_serving as measure_serving
from dse.engines.serving import work_of as work_of
from dse.engines.worker_engine import WorkerEngine as WorkerEngine
from dse.engines.worker_session import WorkerSession as WorkerSession
