"""The config of a model folder: read without transformers where the file alone decides the sizes, else by transformers.

transformers takes seconds to import, and its config classes fill in defaults and compute entries. A family's table
states the defaults of the entries that sizes depend on. A file with anything but these and `HARMLESS` entries is read
by transformers, so that no size is ever a guess.
"""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import UserError
from minitron.files import read_json
from minitron.model.anatomy import AXES, KINDS
from minitron.model.arch import Arch
from minitron.model.families import FAMILIES, family_of
from minitron.model.family import Family
from minitron.model.weights import PICKLES, explain_missing_config, is_pointer

if TYPE_CHECKING:
    from minitron.model.checkpoint import Checkpoint

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)
"""Files that are copied from the teacher's folder to the student's: never code, never weights."""

_NAMES = """
    model_type transformers_version architectures auto_map quantization_config dtype torch_dtype use_cache
    hidden_act hidden_activation activation_function mlp_hidden_act mamba_hidden_act mamba_ssm_cache_dtype
    attention_bias mlp_bias mamba_proj_bias tie_word_embeddings output_router_logits norm_topk_prob is_decoder
    use_parallel_residual scale_attn_weights reorder_and_upcast_attn scale_attn_by_inverse_layer_idx
    summary_use_proj summary_proj_to_labels summary_type summary_activation summary_first_dropout residual_in_fp32
    rescale_prenorm_residual add_cross_attention mamba_norm_before_gate use_mamba_kernels moe_shared_expert_overlap
    use_sliding_window max_window_layers sliding_window_pattern bos_token_id eos_token_id pad_token_id
    pretraining_tp query_pre_attn_scalar num_logits_to_keep n_ctx chunk_size mamba_chunk_size
    max_position_embeddings original_max_position_embeddings no_rope_layer_interval n_shared_experts topk_group
    expand mamba_expand num_nextn_predict_layers mtp_layers_block_type attention_head_dim num_query_groups
    time_step_rank time_step_min time_step_max time_step_floor time_step_limit initializer_range init_std
    rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon z_loss_coefficient router_aux_loss_coef
    router_jitter_noise routed_scaling_factor swiglu_alpha swiglu_limit final_logit_softcapping
    attn_logit_softcapping logits_scaling lm_head_multiplier embedding_multiplier key_multiplier
    attention_multiplier residual_multiplier attention_in_multiplier attention_out_multiplier ssm_in_multiplier
    ssm_out_multiplier ssm_multipliers mlp_multipliers rope_theta rope_scaling rope_parameters rope_local_base_freq
    rotary_emb_base rotary_pct partial_rotary_factor attention_dropout hidden_dropout classifier_dropout dropout
    layerdrop resid_pdrop embd_pdrop attn_pdrop
"""
HARMLESS = frozenset(_NAMES.split())
"""Entries that no size depends on in any family."""


def config_values(path: Path, family: str | None = None) -> dict[str, Any]:
    """Return the entries of a folder's `config.json`, or of a config file by itself, that sizes and memory depend on.

    Entries that the file lacks have the defaults of their `model_type`; entries that neither depends on may be left
    out. `family` reads the file as another `model_type`.

    Raises:
        UserError: see `read_config`.
    """
    stated, model_type = _stated(path, family)
    values = decided_values(stated, family_of(model_type))
    return read_config(path, family).to_dict() if values is None else values  # type: ignore[no-any-return]


def read_config(path: Path, family: str | None = None) -> Any:
    """Return transformers' config of a folder, or of a `config.json` by itself, with its defaults filled in.

    `family` reads the file as another `model_type`. Code that a folder contains (`auto_map`) is never run: every
    supported family is native to transformers.

    Raises:
        UserError: there is no config, its `model_type` is not stated or not supported, or transformers refuses it.
    """
    return transformers_config(path, _stated(path, family)[1])


def transformers_config(path: Path, model_type: str) -> Any:
    """Return transformers' config of a folder or of a `config.json`, read as a `model_type` that transformers has.

    Raises:
        UserError: transformers refuses it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    path = _file(path)
    values, _ = PreTrainedConfig.get_config_dict(path)  # decodes what JSON has no number for, such as infinity
    for name in ("auto_map", "model_type"):
        values.pop(name, None)
    try:
        return AutoConfig.for_model(model_type, **values)
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def stated_model_type(folder: Path) -> str:
    """Return the `model_type` that the config of a folder states."""
    return str(read_json(_file(folder))["model_type"])


def student_values(teacher: "Checkpoint", arch: Arch, kept_layers: list[int]) -> dict[str, Any]:
    """Return the entries of the teacher's config with the sizes of `arch`, as no config class has read them yet.

    Per-layer lists keep the entries of `kept_layers`. The `model_type` is the teacher's, unless that config class
    refuses the shape (`Arch.restatement`).
    """
    values: dict[str, Any] = teacher.config.to_dict()
    for name in arch.family.per_layer_lists:
        if isinstance(values.get(name), list):
            values[name] = [values[name][i] for i in kept_layers]
    values.update(arch.with_layers(teacher.arch, kept_layers).config_values())
    values.update(arch.family.student_values)
    for name in ("transformers_version", "_name_or_path"):
        values.pop(name, None)
    if restatement := arch.restatement:
        values.update(restatement.values, model_type=restatement.restated_as)
        values.pop("architectures", None)
    return values


def student_config(teacher: "Checkpoint", arch: Arch, kept_layers: list[int]) -> Any:
    """Return transformers' config of the entries that `student_values` returns.

    Raises:
        UserError: the config class refuses the shape; the message names both.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = student_values(teacher, arch, kept_layers)
    model_type = values.pop("model_type")
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(model_type, **values)
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"a {model_type} model like the teacher cannot have {_cut_in_words(teacher, arch)}: {reason}"
        ) from error
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return config


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence what transformers reports while the block runs, where it is known already or expected."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    if verbosity >= logging.ERROR:  # every change of a level empties the caches of all loggers
        yield
        return
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _cut_in_words(teacher: "Checkpoint", arch: Arch) -> str:
    whole = teacher.arch.sizes
    sizes = {name: size for name, size in arch.sizes.items() if size != whole.get(name)} or arch.sizes
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def has_weights(path: Path) -> bool:
    """Return whether a path is a folder with weights of any format, rather than a config by itself."""
    return path.is_dir() and any(file.suffix in {".safetensors", *PICKLES} for file in path.iterdir())


def decided_values(stated: Mapping[str, Any], family: Family) -> dict[str, Any] | None:
    """Return the entries that sizes and memory depend on, or None where only transformers can tell them.

    `stated` are the entries of the file. None is returned for an entry that is neither read nor `HARMLESS`, for one
    that is read and of another type than expected or missing without a constant default, for layers whose windows the
    config class computes, for a shape that the config class may refuse, and for families with a derived table.
    """
    if family.model_type not in FAMILIES:  # a derived table holds no defaults
        return None
    names = _names_read(family)
    renamed = {AXES[axis] for axis, name in family.config_names.items() if name != AXES[axis]}
    if family.kinds:
        stated = family.kinds.listing(stated)
    stated = {name: value for name, value in stated.items() if name != "layer_types" or value is not None}
    for name in stated:
        is_remark = name.startswith("_")
        if name not in names and (name in renamed or not (is_remark or name in HARMLESS | {*family.per_layer_lists})):
            return None
    values: dict[str, Any] = {"model_type": family.model_type}
    for name in names:
        value = stated.get(name, family.config_defaults.get(name, ...))
        if value is ...:
            continue
        is_default = value is family.config_defaults.get(name, ...)
        if not is_default and not names[name](value):
            return None
        values[name] = value
    if not _is_complete(values, family):
        return None
    if family.window_switch and not values[family.window_switch]:
        values["sliding_window"] = None
    try:
        arch = Arch.from_config(values)
    except UserError:
        return None
    for name in family.per_layer_lists:
        entries = stated.get(name, [])
        if name in stated and not (isinstance(entries, list) and len(entries) == arch.axis_size("layer")):
            return None
    if values.get("layer_types") is None and family.window_period and "sliding_window_pattern" not in stated:
        values["layer_types"] = family.attention_kinds(arch.axis_size("layer"))
    return values if _is_undisputed(arch, values) and _has_known_windows(arch, values) else None


def _names_read(family: Family) -> dict[str, Any]:
    """Return the entries that are read, each with a test of its type."""
    axes = {axis for row in family.rows for axis in row.axes} | {"layer"}
    axes |= {other for relation in (family.grouped, family.floors) for axis, other in relation.items() if axis in axes}
    names: dict[str, Any] = dict.fromkeys(family.flags, _is_bool)
    names |= {family.config_name(axis): _is_size for axis in axes}
    names |= {"sliding_window": _is_window, "layer_types": _is_attention_list}
    names |= dict.fromkeys(family.config_products, _is_size)
    if family.window_period:
        names["use_bidirectional_attention"] = _is_off  # on, it changes the windows
    if family.window_switch:
        names[family.window_switch] = _is_bool
    if family.product and family.product.ratio:
        names[family.product.ratio] = _is_size
    if family.kinds:
        names[family.kinds.entry] = _is_number_list if family.kinds.listed else _is_kind_list
        names |= {family.kinds.period: _is_size} if family.kinds.period else {}
    return names


def _is_complete(values: Mapping[str, Any], family: Family) -> bool:
    """Whether every entry is there that `Arch.from_config` does not ask for by itself."""
    kinds = (family.kinds.entry, family.kinds.period) if family.kinds else ()
    switch = {family.window_switch} if family.window_switch else set()
    needed = {*family.flags, *filter(None, kinds), *switch, "sliding_window"}
    if family.kinds and family.kinds.listed:
        needed.add(family.config_name("layer"))
    return needed <= values.keys()


def _is_undisputed(arch: Arch, values: Mapping[str, Any]) -> bool:
    """Whether no config class refuses the shape."""
    family, size = arch.family, arch.axis_size
    if (demand := family.demand) and size(demand.multiple) % size(demand.of):
        return False
    if "head_dim" in arch.axes and size("head_dim") % 2:  # rotary embeddings turn pairs of channels
        return False
    if any(values.get(name) not in {None, prod(map(size, axes))} for name, axes in family.config_products.items()):
        return False
    if family.product is None:
        return True
    ratio = values.get(family.product.ratio) if family.product.ratio else 1
    return ratio is not None and prod(map(size, family.product.axes)) == ratio * size(family.product.of)


def _has_known_windows(arch: Arch, values: Mapping[str, Any]) -> bool:
    """Whether the file decides which layers have a sliding window, if any has."""
    kinds = values.get("layer_types", ...)
    if isinstance(kinds, list):
        return len(kinds) == arch.axis_size("layer")
    return kinds is None or not values["sliding_window"]


def _is_bool(value: Any) -> bool:
    return type(value) is bool


def _is_off(value: Any) -> bool:
    return value is None or value is False


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_window(value: Any) -> bool:
    return value is None or _is_size(value)


def _is_number_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _is_kind_list(value: Any) -> bool:
    return _is_list_of(value, KINDS)


def _is_attention_list(value: Any) -> bool:
    return _is_list_of(value, ("full_attention", "sliding_attention"))


def _is_list_of(value: Any, entries: Container[str]) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) and one in entries for one in value)


def _file(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _stated(path: Path, family: str | None) -> tuple[dict[str, Any], str]:
    """Return the entries of a config file, and the `model_type` to read it as."""
    path = _file(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: not a Hugging Face model folder{explain_missing_config(path.parent)}")
    if is_pointer(path):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull there")
    values = read_json(path)
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{path} does not state its model_type")
    model_type = family or str(values["model_type"])
    text = values.get("text_config")
    if isinstance(text, dict) and model_type not in FAMILIES:
        raise UserError(
            f"{path} is of a multimodal model ('{model_type}') around a text model "
            f"('{text.get('model_type', 'of its default type')}'): --text-only reads the text model alone"
        )
    return values, family_of(model_type).model_type
