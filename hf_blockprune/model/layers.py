"""The repeated layers of a model: where they are listed, and the chain that hidden states pass along."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import ModelError
from ..hub.blockprune_merging import Groups, restore
from ..hub.blockprune_tokens import is_merging

MergedStates: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""What layers in which tokens merge hand on: hidden states [images, tokens, width], and the parts of their `Groups`."""
States: TypeAlias = Tensor | MergedStates


@dataclass
class Layer:
    """A layer of a chain: it takes the hidden states that the one before it gives.

    Attributes:
        name: of the module in the model.
        module: itself.
        args, kwargs: what it is called with beside hidden states; known after `learn_calls`.
    """

    name: str
    module: nn.Module
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = field(default_factory=dict)

    def run(self, states: States, module: nn.Module | None = None) -> States:
        """The hidden states after the layer, or after another module in its place."""
        module = module or self.module
        return states_of(module, module(states, *self.args, **self.kwargs))


def hidden_states(output: object) -> Tensor:
    """A layer's output without what some give beside it, such as attention's probabilities."""
    # Whatever else a layer gives is no input of the next one, and told of by `learn_calls`.
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def states_of(module: nn.Module, output: object) -> States:
    """What a layer hands on to the next one, of what it gave."""
    return cast(MergedStates, output) if isinstance(output, tuple) and is_merging(module) else hidden_states(output)


def groups_of(states: States) -> Groups | None:
    """Which patches the tokens of hidden states stand for, None where each stands for itself."""
    return Groups(*states[1:]) if isinstance(states, tuple) else None


def full_states(states: States) -> Tensor:
    """Hidden states of all tokens, [images, all tokens, width]: of those that merged, that of what they merged into."""
    groups = groups_of(states)
    return hidden_states(states) if groups is None else restore(hidden_states(states), groups)


def linear_in(module: nn.Module, name: str) -> nn.Linear:
    """The Linear of a name within a module, which is one."""
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is no Linear"
    return linear


def shape_of(linear: nn.Linear) -> tuple[int, int]:
    """(out_features, in_features)."""
    return linear.out_features, linear.in_features


def linear_from(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """A Linear of a weight [out, in] and a bias [out], which learns, and is in the mode, as another one."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    learns = like.weight.requires_grad
    made.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=learns)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=learns if like.bias is None else like.bias.requires_grad)
    return made.train(like.training)


def layer_lists(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of each list of layers: each ModuleList, or where there is none each Sequential of alike ones."""
    # A parametrized weight holds its parametrizations in a list, which is none of layers.
    modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, ParametrizationList)]
    found: list[tuple[str, nn.Module]] = [(n, module) for n, module in modules if isinstance(module, nn.ModuleList)]
    return found or [(name, module) for name, module in modules if _is_sequence(module)]


def _is_sequence(module: nn.Module) -> bool:
    """Whether it is several layers of one class that have parts, as timm's models hold theirs."""
    children = list(module.children())
    alike = len(children) > 1 and len({type(child) for child in children}) == 1
    return isinstance(module, nn.Sequential) and alike and all(list(child.children()) for child in children)


def layer_chain(model: nn.Module, names: Iterable[str]) -> list[Layer]:
    """The layers of the list that holds all named modules; those of its stages where the list is one of stages.

    Raises:
        ModelError: they do not lie in one list.
    """
    for name, module in layer_lists(model):
        if all(target.startswith(f"{name}.") for target in names):
            return list(_chained(name, module))
    raise ModelError(f"{type(model).__name__}: the pruned Linears lie in several lists of layers; refit needs one")


def _chained(name: str, module: nn.Module) -> Iterator[Layer]:
    """Layers of a list, or of a stage: a module that holds a list of layers and perhaps others before or after it."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}"
        if isinstance(child, nn.ModuleList) or any(isinstance(part, nn.ModuleList) for part in child.children()):
            yield from _chained(full, child)
        elif next(child.parameters(), None) is not None:
            yield Layer(full, child)
