"""Load a Hugging Face model, or only its topology."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dse.errors import ModelError, did_you_mean
from dse.models.checkpoint import Checkpoint, model_without_weights, open_checkpoint
from dse.models.fingerprint import model_fingerprint
from dse.models.heads import Head, checkpoint_has_head, head_of, model_factory
from dse.models.model_source import ModelSource, read_sentence_files, resolve
from dse.models.model_topology import topology_of
from dse.models.transformers_patches import (
    dense_weights_keywords,
    drop_quantization,
    quiet_transformers,
    shared_gguf_reader,
)
from dse.models.waiting_weights import WaitingWeights
from dse.topology import Topology

__all__ = ["AUTO_DTYPE", "DTYPES", "LoadedModel", "default_dtype", "load_model", "load_topology", "read_config"]

logger = logging.getLogger("dse")

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The supported dtypes."""

AUTO_DTYPE = "auto"
"""On a GPU the dtype of the checkpoint, in which it is served; float32 elsewhere. Records name the actual dtype."""


@dataclass(eq=False)
class LoadedModel:
    """A model ready for decomposition: in evaluation mode, without gradients.

    Attributes:
        ref: The reference it was loaded from.
        revision: Its revision on the hub, if one was requested.
        model: The Hugging Face model.
        tokenizer: Its tokenizer.
        topology: Its topology.
        device: Device of its weights.
        dtype: Dtype of its weights.
        sentence_files: Contents of sentence-transformers' files beside the weights, by path; for models without a head.
        checkpoint: The files that hold the weights, if the model was loaded without them; None if they are in memory.
        waiting: Takes the side that is not in use, candidate or baseline, out of the device; None keeps both there.
    """

    ref: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    topology: Topology
    device: torch.device
    dtype: torch.dtype
    sentence_files: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    waiting: WaitingWeights | None = None
    _versions: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._versions = _in_place_changes(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the dense model: config and every byte of its weights.

        Raises:
            ModelError: It is read for the first time while a point is applied, or after weights were changed.
        """
        modules = dict(self.model.named_modules())
        is_dense = {t.name: type(modules.get(t.module)).__name__ in ("Linear", "Conv1D") for t in self.topology.tensors}
        for expert in self.topology.experts:
            weight = getattr(modules.get(expert.module), expert.parameter, None)
            is_dense[expert.name] = isinstance(weight, torch.nn.Parameter)
        if replaced := [name for name, dense in is_dense.items() if not dense]:
            raise ModelError(
                f"the fingerprint must be computed on the dense model, but '{replaced[0]}' is not dense; undo the"
                f" point first, or read `.fingerprint` before applying it"
            )
        if _in_place_changes(self.model) != self._versions:
            raise ModelError("the fingerprint must be computed on the model as loaded, but its weights were changed")
        return model_fingerprint(self.model, self.checkpoint)

    def read_weights(self, place: Callable[[str], torch.device] | None = None) -> None:
        """Read every weight that is still on disk into memory, one by one.

        Args:
            place: Name of a weight to its device; None for `device`.

        Raises:
            ModelError: The device has no room for them.
        """
        if self.checkpoint is None:
            return
        with _memory_errors(self.device, self.ref):
            self.checkpoint.load(self.model, place or (lambda _name: self.device))
        self.checkpoint = None
        self._versions = _in_place_changes(self.model)


def load_model(
    ref: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    role_names: Mapping[str, str] | None = None,
    head: Head | None = None,
    weights_on_disk: bool = False,
) -> LoadedModel:
    """Load a model with its tokenizer and topology.

    Args:
        ref: Hub id, local folder, `.gguf` file, or `demo:<name>`.
        revision: Branch, tag or commit on the hub.
        dtype: float32, float16 or bfloat16.
        device: `cpu`, `cuda`, `cuda:1`, ...
        trust_remote_code: Whether Python code that comes with the model may run.
        role_names: Module-path suffix to role, for architectures that the built-in rules do not cover.
        head: The required head; None for the head named in the checkpoint's config.
        weights_on_disk: Leave the weights in the checkpoint's files, to be read layer by layer (`LoadedModel
            .checkpoint`). A checkpoint that does not allow it, such as a GGUF file, is loaded into memory.

    Raises:
        ModelError: The model cannot be loaded from `ref`, or not in this dtype or on this device, or lacks the head.
        UnknownArchitectureError: No rule gives roles to the model's matrices.
    """
    torch_device = _device(device)
    if dtype != AUTO_DTYPE:
        _dtype(dtype)
    source = resolve(ref, revision)
    if not source.has_weights:
        raise _missing_weights(ref, source)
    with quiet_transformers(), shared_gguf_reader():
        config = read_config(ref, source, trust_remote_code)
        _refuse_quantized(ref, source, config)
        torch_dtype = _default_dtype(config, torch_device) if dtype == AUTO_DTYPE else _dtype(dtype)
        model, checkpoint = None, None
        if weights_on_disk:
            model, checkpoint = _without_weights(ref, source, config, torch_dtype, trust_remote_code, head)
        if model is None:
            model = _weights(ref, source, config, torch_dtype, trust_remote_code, head)
        tokenizer = _tokenizer(ref, source, trust_remote_code)
        sentence_files = read_sentence_files(source) if head_of(type(model)) == "embedding" else {}
        topology = topology_of(model, role_names)
        model = _to_device(model, torch_device, ref)
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return LoadedModel(ref, revision, model, tokenizer, topology, torch_device, torch_dtype, sentence_files, checkpoint)


def load_topology(
    ref: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    role_names: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> Topology:
    """The topology of a model from its config alone; no weights are read or downloaded.

    Args:
        ref: As in `load_model`; a folder with only a config.json is enough.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether Python code that comes with the model may run.
        role_names: Module-path suffix to role, for architectures that the built-in rules do not cover.
        dtype: The dtype in which weights are counted; None for that of the config (float32 if it names none).

    Raises:
        ModelError: The config cannot be read from `ref`.
        UnknownArchitectureError: No rule gives roles to the model's matrices.
    """
    wanted = None if dtype in (None, AUTO_DTYPE) else _dtype(str(dtype))
    source = resolve(ref, revision)
    with quiet_transformers(), shared_gguf_reader():
        config = read_config(ref, source, trust_remote_code)
        counted = wanted or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
        factory = model_factory(config, trust_remote_code)
        with _load_errors(ref), torch.device("meta"):
            if issubclass(factory, PreTrainedModel):
                model = factory._from_config(config, dtype=counted)
            else:
                model = factory.from_config(config, dtype=counted, trust_remote_code=trust_remote_code)
        return topology_of(model, role_names)


def default_dtype(
    ref: str, device: torch.device, *, revision: str | None = None, trust_remote_code: bool = False
) -> str:
    """What dtype "auto" means for a model on a device; reads the model's config only. See `AUTO_DTYPE`.

    Raises:
        ModelError: The config cannot be read from `ref`.
    """
    source = resolve(ref, revision)
    with quiet_transformers(), shared_gguf_reader():
        config = read_config(ref, source, trust_remote_code)
    return str(_default_dtype(config, device)).removeprefix("torch.")


def _default_dtype(config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    saved = config.dtype
    if device.type == "cuda" and isinstance(saved, torch.dtype) and saved in DTYPES.values():
        return saved
    return torch.float32


def _dtype(name: str) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ModelError(
            f"`dtype` must be one of {', '.join(DTYPES)}, but got '{name}'{did_you_mean(str(name), DTYPES)}"
        )
    return DTYPES[name]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"`device` must be like 'cpu' or 'cuda:0', but got '{name}'") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ModelError(
                f"`device` must exist, but got '{name}' and this machine's torch ({torch.__version__}) sees no CUDA"
                f" device; use device='cpu', or install a CUDA build of torch and a driver"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise ModelError(f"`device` must exist, but got '{name}' of {torch.cuda.device_count()} CUDA devices")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ModelError(f"`device` must exist, but got '{name}' and this machine has no Metal device; use 'cpu'")
    elif device.type != "cpu":
        raise ModelError(f"`device` must be 'cpu', 'cuda', 'cuda:<index>' or 'mps', but got '{name}'")
    return device


def read_config(ref: str, source: ModelSource, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a model, without its weights.

    Raises:
        ModelError: It cannot be read, or it does not describe a model.
    """
    with _load_errors(ref):
        config = AutoConfig.from_pretrained(source.location, **source.keywords(trust_remote_code))
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"the config of '{ref}' must describe a model, but is a {type(config).__name__}")
    return config


def _weights(
    ref: str,
    source: ModelSource,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
    head: Head | None,
) -> PreTrainedModel:
    _refuse_other_head(ref, config, head)
    factory = model_factory(config, trust_remote_code, head)
    keywords = source.keywords(trust_remote_code)
    keywords |= {"config": config, "dtype": dtype, "output_loading_info": True}
    keywords |= {"use_safetensors": True} if source.gguf_file is None else dense_weights_keywords()
    model: PreTrainedModel
    with _load_errors(ref):
        model, info = factory.from_pretrained(source.location, **keywords)
        if (
            head == "embedding"
            and info["missing_keys"]
            and all(key.startswith("pooler.") for key in info["missing_keys"])
        ):
            # A checkpoint saved with another head has no pooler, and hidden states do not need one.
            model, info = factory.from_pretrained(source.location, add_pooling_layer=False, **keywords)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the files of '{ref}' must hold every weight of {type(model).__name__}, but {len(missing)} are missing"
            f" (first: {missing[0]}); they would be random, so the model is refused"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"'{ref}' is an adapter; merge it into its base model first (`merge_and_unload()` in peft)")
    if source.gguf_file is not None:
        drop_quantization(model)
    return model


def _without_weights(
    ref: str,
    source: ModelSource,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
    head: Head | None,
) -> tuple[PreTrainedModel | None, Checkpoint | None]:
    """The model without weights and the files that hold them; nothing if they cannot be read one by one."""
    _refuse_other_head(ref, config, head)
    if trust_remote_code and getattr(config, "auto_map", None):
        return None, None
    with _load_errors(ref):
        model = model_without_weights(model_factory(config, trust_remote_code, head), config, dtype)
        checkpoint = open_checkpoint(source, model, dtype)
    if checkpoint is None:
        logger.info("the weights of %s cannot be read layer by layer; they are loaded into memory", ref)
        return None, None
    return model, checkpoint


def _refuse_other_head(ref: str, config: PreTrainedConfig, head: Head | None) -> None:
    """Refuse a checkpoint that was saved with another head: the requested head would be random."""
    if head in ("classification", "question_answering") and not checkpoint_has_head(config, head):
        raise ModelError(
            f"the task needs a model with a {head.replace('_', '-')} head, but '{ref}' is saved as"
            f" {', '.join(config.architectures or ())} and has none; name a checkpoint that was trained for the task"
        )


def _tokenizer(ref: str, source: ModelSource, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    with _load_errors(ref, "the tokenizer of ", "; save it beside the weights with `tokenizer.save_pretrained(...)`"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.location, **source.keywords(trust_remote_code)
        )
    return tokenizer


def _to_device(model: PreTrainedModel, device: torch.device, ref: str) -> PreTrainedModel:
    with _memory_errors(device, ref):
        # Weights that are still on disk are on the meta device and stay there.
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]
    return model


@contextlib.contextmanager
def _memory_errors(device: torch.device, ref: str) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"the device {device} must have memory for '{ref}', but is full; use a smaller dtype, or set `residency`"
        ) from error


def _missing_weights(ref: str, source: ModelSource) -> ModelError:
    if source.has_pickles:
        return ModelError(
            f"the weights of '{ref}' must be .safetensors, but it has PyTorch files only, which are never opened"
            f" because they can run code; look for a revision with safetensors, or convert them once if you trust them"
            f" (`AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)`)"
        )
    return ModelError(
        f"the weights must be .safetensors files beside the config, but '{ref}' has none; a config alone is enough for"
        f" `dse cost` and `dse space` only"
    )


def _refuse_quantized(ref: str, source: ModelSource, config: PreTrainedConfig) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and source.gguf_file is None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ModelError(
            f"the weights must be floating point to be decomposed, but '{ref}' is quantised ({method}); name the"
            f" unquantised model"
        )


@contextlib.contextmanager
def _load_errors(ref: str, what: str = "", remedy: str = "") -> Iterator[None]:
    """Turn any error of transformers, safetensors or gguf on damaged or foreign files into one clear line."""
    try:
        yield
    except Exception as error:  # parsers raise any error on damaged files, even ZeroDivisionError
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ModelError(
                f"'{ref}' needs its own Python code, which is not run unless you allow it; read that code, then set"
                f" `trust_remote_code: true` in the study file (or pass trust_remote_code=True)"
            ) from error
        if "ignore_mismatched_sizes" in text:
            text = "its weights do not have the shapes that its config.json describes"
        elif type(error) not in (OSError, ValueError, RuntimeError, SafetensorError):
            text = f"{type(error).__name__}: {text}"
        text = text if len(text) <= 160 else text[:157] + "..."
        raise ModelError(f"{what}'{ref}' cannot be loaded: {text}{remedy}") from error


def _in_place_changes(model: PreTrainedModel) -> int:
    return sum(parameter._version for parameter in model.parameters() if not parameter.is_inference())
