"""Why a checkpoint's tensors have other names than the family's: an adapter that is not merged, or a prefix
from the tool that saved them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ..checkpoint.huggingface import MERGE, some

# what wrappers add to names: torch.compile, DataParallel, FSDP, activation checkpointing, peft
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|"
    r"base_model)\."
)
_ADAPTER = re.compile(r"(?<![^.])(lora_\w+|base_layer|modules_to_save)\.")
Change = dict[str, str]  # the family's name of a tensor -> its name here


def why_different(names: Sequence[str], missing: Sequence[str], surplus: Sequence[str]) -> str:
    """A sentence with the remedy; empty if no known cause applies. names: the family's; missing: those of
    them that the checkpoint lacks; surplus: names of the checkpoint that are not the family's."""
    if of_adapter := [name for name in surplus if _ADAPTER.search(name)]:
        return (
            f"{len(of_adapter)} tensors belong to an adapter (LoRA) that is not merged "
            f"({some(of_adapter)}): {MERGE}."
        )
    if not missing or not surplus:
        return ""
    best = max(
        _changes(names, missing, surplus),
        key=lambda change: len(set(change[1].values()) & set(surplus)),
        default=None,
    )
    if best is None:
        return ""
    said, change = best
    renamed = [name for name in missing if change[name] in set(surplus)]
    left = sorted(set(surplus) - set(change.values()))
    if 2 * len(renamed) < len(missing):
        return ""
    example = f"{change[renamed[0]]} in place of {renamed[0]}"
    if len(renamed) == len(missing) and not left:
        return (
            f"{said} ({example}); otherwise all {len(names)} tensors match. Save them under their own "
            "names: read each file with safetensors.torch.load_file, rename, write it with save_file."
        )
    return (
        f"{said} ({example}); apart from that, {len(missing) - len(renamed)} tensors are missing and "
        f"{len(left)} are not part of this model "
        f"({some([name for name in missing if name not in renamed] + left)}): "
        "save the model's own state_dict under its own names."
    )


def _changes(
    names: Sequence[str], missing: Sequence[str], surplus: Sequence[str]
) -> Iterator[tuple[str, Change]]:
    """Changes that may have turned the family's names into the ones here, each with its message."""
    for own, there in sorted(
        {pair for name in surplus for other in missing[:2] for pair in _beginnings(other, name)}
    ):
        if own:
            said = (
                f"the names begin with {there!r} in place of {own!r}"
                if there
                else f"the names lack the prefix {own!r}"
            )
        else:
            said = f"the names have the prefix {there!r}"
        for rest in (there, ""):  # for names that do not begin with `own`, such as lm_head
            yield (
                said,
                {name: there + name[len(own) :] if name.startswith(own) else rest + name for name in names},
            )
    if inside := sorted({match.group(0) for name in surplus for match in _WRAPPERS.finditer(name)}):
        unwrapped = {_WRAPPERS.sub("", name): name for name in surplus}
        said = f"the names contain {' and '.join(map(repr, inside))}, added by a wrapper"
        yield said, {name: unwrapped.get(name, name) for name in names}


def _beginnings(own: str, there: str) -> Iterator[tuple[str, str]]:
    """What precedes the common end of two names, if that has at least two parts."""
    mine, theirs, same = own.split("."), there.split("."), 0
    while same < min(len(mine), len(theirs)) and mine[-1 - same] == theirs[-1 - same]:
        same += 1
    if same >= 2:
        yield (
            "".join(part + "." for part in mine[: len(mine) - same]),
            "".join(part + "." for part in theirs[: len(theirs) - same]),
        )
