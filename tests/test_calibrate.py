"""Statistics against the formulas, computed the slow way from the activations of single blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from minitron.data.blocks import Blocks
from minitron.data.stream import Stream
from minitron.errors import UserError
from minitron.model.anatomy import Tap
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import load_model, module_of
from minitron.pruning import require_scores
from minitron.pruning.calibrate import ENDS, OTHERS, calibrate
from minitron.pruning.other_text import random_ids
from minitron.pruning.scores import SCORES, Importance, Score, score
from minitron.pruning.selection import score_shape, select
from minitron.pruning.statistics import STREAM_MOMENT
from minitron.recipe import CalibrationRecipe, Recipe
from minitron.runtime import Runtime
from tests.conftest import MECHANISMS

CPU = torch.device("cpu")
MINITRON = CalibrationRecipe()


@pytest.fixture
def blocks() -> Blocks:
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    return Blocks(ids, torch.ones_like(ids, dtype=torch.int32))


def importance_of(teacher: Checkpoint, blocks: Blocks, recipe: CalibrationRecipe = MINITRON) -> Importance:
    """By the true pass, in float64 where the family's kernels know it."""
    statistics = calibrate(teacher, blocks, recipe=recipe, runtime=Runtime(CPU, dtype_of(teacher)))
    return score(statistics, teacher, recipe)


def dtype_of(teacher: Checkpoint) -> torch.dtype:
    return torch.float32 if "expert" in teacher.arch.axes else torch.float64


def reference_model(teacher: Checkpoint) -> Any:
    model = load_model(teacher, CPU, torch.float64)
    model.set_experts_implementation("eager")  # the others do not know float64
    return model


OVER_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.abs().mean(dim=0),
    "l2": lambda x: x.square().sum(dim=0).sqrt(),
    "var": lambda x: (x - x.mean(dim=0)).square().mean(dim=0),
}
OVER_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda s: s.mean(dim=0),
    "l2": lambda s: s.square().sum(dim=0).sqrt(),
    "var": lambda s: (s - s.mean(dim=0)).square().mean(dim=0),
}


class Seen(dict[str, list[Tensor]]):
    """What went into or came out of modules, a list of (tokens, width) by module, block after block."""

    def watch(self, module: torch.nn.Module, name: str, output: bool = False) -> None:
        if output:
            module.register_forward_hook(lambda _, __, out: self.add(name, out))
        else:
            module.register_forward_pre_hook(lambda _, inputs: self.add(name, inputs[0]))

    def add(self, name: str, activation: Tensor) -> None:
        self.setdefault(name, []).append(activation.flatten(0, -2).double())

    def aggregate(self, name: str, batch: str = "l2", sequence: str = "mean") -> Tensor:
        """By default the batch L2 of the sequence mean of absolute values."""
        return OVER_BLOCKS[batch](torch.stack([OVER_TOKENS[sequence](x) for x in self[name]]))


def assert_close(found: Tensor, expected: Tensor, teacher: Checkpoint) -> None:
    exact = dtype_of(teacher) == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9 if exact else 1e-4, atol=1e-12 if exact else 1e-5)


def assert_scores(teacher: Checkpoint, blocks: Blocks, recipe: CalibrationRecipe) -> None:
    """Every axis but experts and Mamba heads against sums over the activations of a whole model, module by module."""
    model, arch, importance = reference_model(teacher), teacher.arch, importance_of(teacher, blocks, recipe)
    assert {axis: list(scores.shape) for axis, scores in importance.items()} == {
        axis: score_shape(arch, axis) for axis in arch.prunable_axes
    }
    seen, single = Seen(), [tap for tap in arch.taps if len(tap.axes) == 1 and tap.side != "routed"]
    for tap in single:
        for i in arch.layer_numbers(tap.kind) if tap.axes[0] in arch.axes else []:
            name = tap.module.replace("{i}", str(i))
            if name not in seen:
                seen[name] = []
                seen.watch(model.get_submodule(name), name, output=tap.side == "output")
    layers = [model.get_submodule(arch.family.layer.replace("{i}", str(i))) for i in range(arch.axis_size("layer"))]
    residuals: list[list[Tensor]] = [[] for _ in layers]
    for layer, outputs in zip(layers, residuals, strict=True):
        layer.register_forward_hook(
            lambda _, __, out, outputs=outputs: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    for ids in blocks.ids:
        model(input_ids=ids[None])

    def aggregate(tap: Tap, i: int) -> Tensor:
        return seen.aggregate(tap.module.replace("{i}", str(i)), recipe.batch, recipe.sequence)

    hidden = [aggregate(tap, i) for tap in single if tap.axes == ("hidden",) for i in range(arch.axis_size("layer"))]
    assert_close(importance["hidden"], torch.stack(hidden).sum(dim=0), teacher)
    for tap in single:
        (axis,) = tap.axes
        if axis == "hidden" or axis not in arch.axes:
            continue
        for i in arch.layer_numbers(tap.kind):
            taps = [other for other in single if other.axes == (axis,) and other.kind == tap.kind]
            entries = [aggregate(other, i).view(arch.axis_size(axis), -1).norm(dim=1) for other in taps]
            assert_close(importance[axis][i], torch.stack(entries).sum(dim=0), teacher)
    for i in range(1, len(layers)):  # what goes into a layer is what the one before put out
        cosines = [cosine_similarity(*pair, dim=-1).mean() for pair in zip(residuals[i - 1], residuals[i], strict=True)]
        influence = 1 - torch.stack(cosines).mean()
        torch.testing.assert_close(importance["layer"][i], influence, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_one_pass_layer_by_layer_gives_every_score_of_the_whole_model(teacher: Checkpoint, blocks: Blocks) -> None:
    assert_scores(teacher, blocks, MINITRON)


@pytest.mark.parametrize("batch", ["l2", "mean", "var"])
@pytest.mark.parametrize("sequence", ["mean", "l2", "var"])
@torch.no_grad()
def test_every_aggregate(teachers: Callable[[str], Checkpoint], blocks: Blocks, batch: Any, sequence: Any) -> None:
    recipe = CalibrationRecipe(batch=batch, sequence=sequence)
    assert_scores(teachers("llama"), blocks, recipe)
    if recipe != MINITRON:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(
                importance_of(teachers("llama"), blocks, recipe)["ffn"], importance_of(teachers("llama"), blocks)["ffn"]
            )


@pytest.mark.parametrize("choice", ["x", "z", "out_proj"])
@pytest.mark.parametrize("variant", ["mamba2", "nemotron_h", "bamba", "falcon_h1"])
@torch.no_grad()
def test_mamba_heads_and_channels_are_scored_by_what_is_chosen(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, variant: str, choice: Any
) -> None:
    teacher = teachers(variant)
    model, arch = reference_model(teacher), teacher.arch
    importance = importance_of(teacher, blocks, CalibrationRecipe(mamba_scores=choice))
    layer = arch.layer_numbers("mamba")[0] if arch.layer_counts else 0
    block = model.get_submodule(arch.family.layer.replace("{i}", str(layer)))
    seen, mixer = Seen(), next(module for module in block.modules() if hasattr(module, "conv1d"))
    seen.watch(mixer.in_proj, "in", output=True)
    seen.watch(mixer.out_proj, "out_proj")
    for ids in blocks.ids:
        model(input_ids=ids[None])
    shape, width = (mixer.num_heads, mixer.head_dim), mixer.num_heads * mixer.head_dim
    seen["z"], seen["x"] = [x[:, :width] for x in seen["in"]], [x[:, width : 2 * width] for x in seen["in"]]
    aggregate = seen.aggregate(choice).view(shape)
    assert_close(importance["mhead"][layer], aggregate, teacher)
    assert_close(importance["mchan"][layer], aggregate.norm(dim=0), teacher)
    for other in {"x", "z", "out_proj"} - {choice}:
        assert not torch.allclose(importance["mhead"][layer], seen.aggregate(other).view(shape), rtol=1e-3)


@torch.no_grad()
def test_mamba_heads_are_ranked_in_their_group_on_the_channels_that_stay(
    teachers: Callable[[str], Checkpoint], blocks: Blocks
) -> None:
    arch = teachers("nemotron_h").arch
    importance = importance_of(teachers("nemotron_h"), blocks)
    # Channels 0 and 1 are the best overall. Head 1 is the better of its group (0 1) on all channels, head 0 on these.
    heads = torch.full((6, 8), 0.1, dtype=torch.float64)
    heads[:, :2] = 5.0
    heads[1, 2:] = 4.0
    heads[1, :2] = 4.0
    heads[[3, 4], :2] = 9.0
    importance["mhead"][0], importance["mchan"][0] = heads, heads.norm(dim=0)
    cut = select(importance, arch, arch.resized(mamba_num_heads=3, mamba_head_dim=2))
    assert cut["mchan"][0].tolist() == [0, 1]
    assert cut["mhead"][0].tolist() == [0, 3, 4]
    whole = select(importance, arch, arch.resized(mamba_num_heads=3))
    assert whole["mhead"][0].tolist() == [1, 3, 4]


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "nemotron_h-latent"])
@torch.no_grad()
def test_experts_are_scored_by_the_tokens_that_reach_them(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, variant: str
) -> None:
    teacher = teachers(variant)
    model, arch = reference_model(teacher), teacher.arch
    importance = importance_of(teacher, blocks)
    unweighted = importance_of(teacher, blocks, CalibrationRecipe(expert_scores="norm"))
    layer = arch.layer_numbers("moe")[0] if arch.layer_counts else 0
    experts = next(m for n, m in model.named_modules() if n.endswith("experts") and f"layers.{layer}." in n)
    calls: list[tuple[Tensor, ...]] = []
    hook = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    for ids in blocks.ids:
        model(input_ids=ids[None])
    hook.remove()
    ffn = importance["expert_ffn" if "expert_ffn" in importance else "ffn"][layer]
    down = experts.down_proj if experts.is_transposed else experts.down_proj.mT  # (experts, ffn, hidden)
    for e in range(4):
        squared, norms, weighted = torch.zeros(ffn.shape[1], dtype=torch.float64), [], []
        for states, numbers, weights in calls:
            token, place = (numbers == e).nonzero(as_tuple=True)
            # The expert alone, asked for the tokens that reach it with a weight of one: linear in its second matrix.
            chosen, ones = torch.full((len(token), 1), e), torch.ones(len(token), 1, dtype=torch.float64)
            norms.append(experts(states[token], chosen, ones).norm(dim=1))
            weighted.append(norms[-1] * weights[token, place])
            seen = neurons(experts, e, states[token])
            squared += (seen.abs().sum(dim=0) / len(states)).square()
            bias = experts.down_proj_bias[e] if experts.has_bias else 0.0
            torch.testing.assert_close(
                seen @ down[e] + bias, experts(states[token], chosen, ones), atol=1e-4, rtol=1e-4
            )
        count = max(1, len(torch.cat(norms)))
        assert_close(ffn[e], squared.sqrt(), teacher)
        assert_close(importance["expert"][layer][e], torch.cat(weighted).sum() / count, teacher)
        assert_close(unweighted["expert"][layer][e], torch.cat(norms).sum() / count, teacher)


def neurons(experts: Any, number: int, states: Tensor) -> Tensor:
    """What enters an expert's second matrix, read off by making that matrix the identity."""
    down, hidden = experts.down_proj.clone(), states.shape[1]
    pieces, width = [], down.shape[1] if experts.is_transposed else down.shape[2]
    ones, chosen = torch.ones(len(states), 1, dtype=torch.float64), torch.full((len(states), 1), number)
    bias = experts.down_proj_bias[number] if experts.has_bias else 0.0
    for start in range(0, width, hidden):
        eye = torch.zeros(width, hidden, dtype=torch.float64)
        for i in range(min(hidden, width - start)):
            eye[start + i, i] = 1.0
        experts.down_proj[number] = eye if experts.is_transposed else eye.T
        pieces.append((experts(states, chosen, ones) - bias)[:, : width - start])
    experts.down_proj.copy_(down)
    return torch.cat(pieces, dim=1)


WITH_MLP = ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "nemotron_h-latent"]


@pytest.mark.parametrize("variant", WITH_MLP)
@torch.no_grad()
def test_wanda_scores_neurons_by_weights_times_activation_norm(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, variant: str
) -> None:
    """Σ_i |W_ij| · ‖x_j‖₂ in float64, neuron by neuron, from the weights and activations of a whole model."""
    teacher = teachers(variant)
    model, arch = reference_model(teacher), teacher.arch
    importance, by_activation = (
        importance_of(teacher, blocks, CalibrationRecipe(ffn_scores=name)) for name in ("wanda", "input_of_second")
    )
    taps = [tap for tap in arch.family.taps if tap.axes[0] in {"ffn", "expert_ffn", "shared_ffn"}]
    assert taps
    for tap in taps:
        for layer in arch.layer_numbers(tap.kind):
            module = model.get_submodule(tap.module.replace("{i}", str(layer)))
            read = neurons_read_by_experts if tap.side == "routed" else neurons_read
            pairs, scores = read(module, model, blocks), importance[tap.axes[0]][layer]
            expected = torch.stack([wanda_by_hand(inputs, weight) for inputs, weight in pairs]).view_as(scores)
            assert_close(scores, expected, teacher)
            without_weights = torch.stack([inputs.norm(dim=0) for inputs, _ in pairs]).view_as(scores)
            for wrong in (by_activation[tap.axes[0]][layer], without_weights):
                with pytest.raises(AssertionError):
                    assert_close(wrong, expected, teacher)


def wanda_by_hand(inputs: Tensor, weight: Tensor) -> Tensor:
    """The slow formula, of inputs (tokens, ffn) and a matrix (hidden, ffn)."""
    scores = [weight[:, j].abs().sum() * inputs[:, j].square().sum().sqrt() for j in range(weight.shape[1])]
    return torch.stack(scores).double()


def neurons_read(module: Any, model: Any, blocks: Blocks) -> list[tuple[Tensor, Tensor]]:
    """The inputs (tokens, ffn) of a module over all blocks, and its matrix (hidden, ffn)."""
    seen = Seen()
    seen.watch(module, "in")
    for ids in blocks.ids:
        model(input_ids=ids[None])
    weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T  # GPT-2 stores the transpose
    return [(torch.cat(seen["in"]), weight)]


def neurons_read_by_experts(module: Any, model: Any, blocks: Blocks) -> list[tuple[Tensor, Tensor]]:
    """The same of every expert, on the tokens that reach it."""
    calls: list[tuple[Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    for ids in blocks.ids:
        model(input_ids=ids[None])
    hook.remove()
    reads = []
    for e in range(len(module.down_proj)):
        states = torch.cat([states[(numbers == e).any(dim=1)] for states, numbers, _ in calls])
        weight = module.down_proj[e].T if module.is_transposed else module.down_proj[e]
        reads.append((neurons(module, e, states), weight))
    return reads


@pytest.mark.parametrize("sequence", ["mean", "var"])
@pytest.mark.parametrize("variant", ["nemotron", "opt", "phi3", "falcon_h1", *WITH_MLP])
@torch.no_grad()
def test_neurons_are_scored_by_the_first_linear_as_the_paper_writes_it(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, variant: str, sequence: Any
) -> None:
    """Σ_{B,S} X·W1ᵀ, W1 being what the nonlinearity is applied to, in float64 from weights and inputs."""
    teacher = teachers(variant)
    model, arch = reference_model(teacher), teacher.arch
    recipe = CalibrationRecipe(ffn_scores="first_linear", sequence=sequence)
    importance, by_second = (
        importance_of(teacher, blocks, each)
        for each in (recipe, recipe.model_copy(update={"ffn_scores": "input_of_second"}))
    )
    for tap in [tap for tap in arch.family.taps if tap.axes[0] in {"ffn", "expert_ffn", "shared_ffn"}]:
        for layer in arch.layer_numbers(tap.kind):
            module = model.get_submodule(tap.module.replace("{i}", str(layer)))
            if tap.side == "routed":
                expected = by_first_linear_of_experts(module, model, blocks, sequence)
            else:
                mlp = model.get_submodule(tap.module.replace("{i}", str(layer)).rpartition(".")[0])
                expected = by_first_linear(mlp, model, blocks, sequence)
            scores = importance[tap.axes[0]][layer]
            assert_close(scores, expected.view_as(scores), teacher)
            with pytest.raises(AssertionError):
                assert_close(by_second[tap.axes[0]][layer], expected.view_as(scores), teacher)


def by_first_linear(mlp: Any, model: Any, blocks: Blocks, sequence: str) -> Tensor:
    """The slow formula: the product of an MLP's inputs with W1, of the gate in a gated MLP."""
    names = ("gate_proj", "gate_up_proj", "c_fc", "fc1", "up_proj")  # the first that there is
    first = next(getattr(mlp, name) for name in names if hasattr(mlp, name))
    weight = first.weight if isinstance(first, torch.nn.Linear) else first.weight.T  # GPT-2 stores the transpose
    width = len(weight) // 2 if hasattr(mlp, "gate_up_proj") else len(weight)
    seen = Seen()
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.add("in", inputs[0]))
    for ids in blocks.ids:
        model(input_ids=ids[None])
    handle.remove()
    bias = 0.0 if first.bias is None else first.bias[:width]
    seen["W1"] = [x @ weight[:width].T + bias for x in seen["in"]]
    return seen.aggregate("W1", sequence=sequence)


def by_first_linear_of_experts(module: Any, model: Any, blocks: Blocks, sequence: str) -> Tensor:
    """The slow formula of every expert, where tokens that do not reach it count as zeros."""
    calls: list[tuple[Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, args: calls.append(args))
    for ids in blocks.ids:
        model(input_ids=ids[None])
    hook.remove()
    name, scores = "gate_up_proj" if module.has_gate else "up_proj", []
    for e in range(len(module.down_proj)):
        weight = getattr(module, name)[e] if module.is_transposed else getattr(module, name)[e].T  # (hidden, …)
        bias = getattr(module, f"{name}_bias")[e] if module.has_bias else torch.zeros(weight.shape[1])
        if module.has_gate:  # GPT-OSS stores gate and up of a neuron side by side, others all gates first
            rows = slice(None, None, 2) if not module.is_concatenated else slice(weight.shape[1] // 2)
            weight, bias = weight[:, rows], bias[rows]
        seen = Seen()
        for states, numbers, _ in calls:
            reached = (numbers == e).any(dim=1, keepdim=True)
            seen.add("W1", torch.where(reached, states.double() @ weight.double() + bias.double(), 0.0))
        scores.append(seen.aggregate("W1", sequence=sequence))
    return torch.stack(scores)


@pytest.mark.parametrize("sequence", ["mean", "var"])
@pytest.mark.parametrize("variant", ["llama", "nemotron", "gpt2", "gpt_oss", "nemotron_h", "falcon_h1"])
@torch.no_grad()
def test_heads_are_scored_by_each_tokens_norm_as_the_paper_writes_it(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, variant: str, sequence: Any
) -> None:
    """Σ_{B,S} ‖Attn(X·W_Q, X·W_K, X·W_V)‖₂ head by head in float64; of KV groups, over the heads of the group."""
    teacher = teachers(variant)
    model, arch = reference_model(teacher), teacher.arch
    recipe = CalibrationRecipe(head_scores="aggregate_of_norms", sequence=sequence)
    importance, by_channel = (
        importance_of(teacher, blocks, each)
        for each in (recipe, recipe.model_copy(update={"head_scores": "norm_of_aggregates"}))
    )
    taps = [tap for tap in arch.taps if tap.axes[0] in {"query", "kv"} and tap.axes[0] in arch.axes]
    assert taps
    for tap in taps:
        for layer in arch.layer_numbers(tap.kind):
            seen = Seen()
            seen.watch(model.get_submodule(tap.module.replace("{i}", str(layer))), "in")
            for ids in blocks.ids:
                model(input_ids=ids[None])
            count = arch.axis_size(tap.axes[0])
            heads = [list(x.chunk(count, dim=1)) for x in seen["in"]]
            seen["norms"] = [torch.stack([h.square().sum(dim=1).sqrt() for h in block], dim=1) for block in heads]
            expected = seen.aggregate("norms", sequence=sequence)
            assert_close(importance[tap.axes[0]][layer], expected, teacher)
            with pytest.raises(AssertionError):
                assert_close(by_channel[tap.axes[0]][layer], expected, teacher)


def test_a_score_of_ones_own_needs_a_line_in_the_table(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teachers("llama")
    recipe = CalibrationRecipe(ffn_scores="variance")
    with pytest.raises(
        UserError, match=r"calibration.ffn_scores: unknown value 'variance'; accepted: input_of_second, first_linear, w"
    ):
        importance_of(teacher, blocks, recipe)
    monkeypatch.setitem(SCORES["ffn"], "variance", Score(lambda read: read.aggregate("var", "mean"), needs=("var",)))
    by_variance = importance_of(teacher, blocks, CalibrationRecipe(batch="mean", sequence="var"))
    torch.testing.assert_close(importance_of(teacher, blocks, recipe)["ffn"], by_variance["ffn"])
    assert not torch.allclose(importance_of(teacher, blocks)["ffn"], by_variance["ffn"], rtol=1e-3)


@pytest.mark.parametrize("key", ["batch", "sequence", "mamba_scores", "expert_scores", "ffn_scores", "head_scores"])
def test_an_unknown_score_is_refused_before_any_work(key: str) -> None:
    recipe = Recipe.model_validate({"teacher": "none", "calibration": {key: "best"}})
    with pytest.raises(UserError, match=rf"calibration.{key}: unknown value 'best'; accepted: .*\w"):
        require_scores(recipe)
    require_scores(Recipe(teacher="none"))


@pytest.mark.parametrize("teacher", MECHANISMS, indirect=True)
def test_broken_activations_are_an_error(teacher: Checkpoint, blocks: Blocks) -> None:
    class Broken(Checkpoint):
        def tensor(self, name: str) -> Tensor:
            value = super().tensor(name)
            return value * float("nan") if ".1." in name else value

    broken = Broken(**{k: getattr(teacher, k) for k in ("folder", "config", "arch", "tensors")})
    with pytest.raises(UserError, match=r"\.1\..* holds NaN or infinity"):
        importance_of(broken, blocks)


@pytest.mark.parametrize("teacher", MECHANISMS, indirect=True)
def test_scores_do_not_depend_on_the_order_of_blocks_but_on_the_blocks(teacher: Checkpoint, blocks: Blocks) -> None:
    one = importance_of(teacher, blocks)
    turned = importance_of(teacher, Blocks(blocks.ids.flip(0), blocks.num_bytes))
    fewer = importance_of(teacher, blocks[:2])
    for name in one:
        torch.testing.assert_close(one[name], turned[name], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(one[name], fewer[name], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_in_a_file_is_the_one_in_memory(
    teachers: Callable[[str], Checkpoint],
    blocks: Blocks,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    teacher = teachers("llama")
    in_memory = calibrate(teacher, blocks, recipe=MINITRON, runtime=Runtime(CPU, dtype), others=blocks[:1])
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("minitron.data.stream.SPILL_BYTES", 0)
    assert Stream(blocks, 48, dtype).file is not None
    spilled = calibrate(teacher, blocks, recipe=MINITRON, runtime=Runtime(CPU, dtype), others=blocks[:1])
    assert all(torch.equal(in_memory[name], spilled[name]) for name in in_memory)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen2", "nemotron", "gpt_neox"])
def test_the_moment_of_the_stream_counts_its_ends_more_and_other_text_less(
    variant: str, teachers: Callable[[str], Checkpoint], blocks: Blocks
) -> None:
    teacher = teachers(variant)
    arch = teacher.arch
    ids = random_ids(1, blocks.context, arch.axis_size("vocab"), seed=0)
    others = Blocks(ids, torch.ones_like(ids, dtype=torch.int32))

    def expected(ends: float, share: float) -> Tensor:
        layers, total = range(arch.axis_size("layer")), torch.zeros(())
        for part, weight in ((blocks, 1.0), (others, share)):
            model = reference_model(teacher)
            seen, inner, final = Seen(), arch.norms_before_blocks, arch.family.final_norm
            for i in layers:
                for norm in inner:
                    seen.watch(module_of(model, norm, i), f"{norm.name} {i}")
            seen.watch(module_of(model, final), "final")
            for ids in part.ids:
                model(input_ids=ids[None])
            for name, reads in seen.items():
                x = torch.cat(reads)
                x = x - x.mean(dim=-1, keepdim=True) if arch.family.is_centred else x
                x = x / x.square().mean(dim=-1, keepdim=True).sqrt()
                factor = ends if name in {f"{inner[0].name} 0", "final"} else 1.0
                total = total + weight * factor * (x.T @ x) / blocks.num_tokens
        return total

    found = calibrate(teacher, blocks, recipe=MINITRON, runtime=Runtime(CPU, torch.float64), others=others)
    moment = found.pop(STREAM_MOMENT)
    torch.testing.assert_close(moment, expected(ENDS, OTHERS), rtol=1e-4, atol=1e-5)
    for ends, share in ((1.0, OTHERS), (ENDS, 0.0)):
        assert not torch.allclose(moment, expected(ends, share), rtol=1e-2, atol=1e-2)
    without = calibrate(teacher, blocks, recipe=MINITRON, runtime=Runtime(CPU, torch.float64))
    assert without.keys() == found.keys()
    assert all(torch.equal(without[key], found[key]) for key in found)
