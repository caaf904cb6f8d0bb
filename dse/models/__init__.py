"""Load a model and find its decomposable parts."""

from dse.models.demo import DEMO_MODELS as DEMO_MODELS
from dse.models.demo import demo_model_folder as demo_model_folder
from dse.models.fingerprint import model_fingerprint as model_fingerprint
from dse.models.heads import Head as Head
from dse.models.heads import context_tokens as context_tokens
from dse.models.heads import head_of as head_of
from dse.models.load import DTYPES as DTYPES
from dse.models.load import LoadedModel as LoadedModel
from dse.models.load import load_model as load_model
from dse.models.load import load_topology as load_topology
from dse.models.model_topology import topology_of as topology_of
from dse.models.passed_layer import PassedLayer as PassedLayer
from dse.models.removed_modules import RemovedBlock as RemovedBlock
