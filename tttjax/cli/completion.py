"""Print the completion script of a shell: commands, flags, paths, recipes, configuration fields.

examples:
  tttjax completion bash > ~/.local/share/bash-completion/completions/tttjax
  tttjax completion zsh > ~/.zfunc/_tttjax        with `fpath=(~/.zfunc $fpath)` before `compinit`
  tttjax completion fish > ~/.config/fish/completions/tttjax.fish

The script lists what this version offers, so that completing a word starts no Python; write it
again after an update.
"""

import argparse
import importlib
from typing import Any

from tttjax.config.fields import field_info
from tttjax.config.files import OVERRIDE_PREFIX, recipe_names
from tttjax.config.schema import all_fields

SHELLS = ("bash", "zsh", "fish")
# Beginnings of the metavars of paths, in all commands.
_FOLDERS, _FILES = ("DIR", "WORKDIR"), ("FILE", "NEW", "PATH", "RUN", "SOURCE", "TABLE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax completion`."""
    parser.add_argument("shell", choices=SHELLS, help="shell to write the script for")


def run(args: argparse.Namespace) -> int:
    """`tttjax completion` from parsed arguments; returns the exit code."""
    from tttjax.cli.main import full_parser

    print(completion_script(full_parser(), args.shell))
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for the shell. Changes the parser, which is of no use for parsing afterwards."""
    import shtab

    _prepare(parser, shell, _recipe_completer())
    script = shtab.complete(parser, shell)
    return script + _BASH_WRAPPER if shell == "bash" else script


def _prepare(parser: argparse.ArgumentParser, shell: str, recipes: dict[str, Any]) -> None:
    """Tells shtab how to complete the values of all arguments."""
    if "--config" in parser._option_string_actions:
        _add_overrides(parser)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _prepare(subparser, shell, recipes)
        elif completer := _completer(str(action.metavar), recipes):
            action.complete = completer  # type: ignore[attr-defined]
        if shell == "zsh" and action.option_strings and action.nargs != 0:
            # `--out=[...]` is zsh's notation for both `--out=DIR` and `--out DIR`. Colons and
            # brackets of a metavar would be notation too.
            action.option_strings = [f"{option}=" for option in action.option_strings]
            action.metavar = None


def _completer(metavar: str, recipes: dict[str, Any]) -> dict[str, Any] | None:
    import shtab

    if "[:ARG]" in metavar:
        return recipes
    if metavar.startswith(_FOLDERS):
        return shtab.DIRECTORY
    return shtab.FILE if metavar.startswith(_FILES) else None


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    """`--config.x.y` as flags, which the command line splits off before it parses the others."""
    for name, field in all_fields().items():
        info = field_info(field)
        choices = ("true", "false") if field.type is bool else () if info.joined else info.choices
        parser.add_argument(
            f"{OVERRIDE_PREFIX}{name}",
            choices=choices or None,
            help=info.doc.partition(". ")[0].replace("%", "%%"),
        )


def _recipe_completer() -> dict[str, Any]:
    """Completes `NAME:ARG` of recipes, and Python files."""
    names = recipe_names()
    modules = [importlib.import_module(f"tttjax.recipes.{name}") for name in names]
    recipes = " ".join(
        f"{name}:{recipe}"
        for name, module in zip(names, modules, strict=True)
        for recipe in module.recipes()
    )
    files = " ".join(f"{name}:" for name in names)
    return {
        "bash": "_tttjax_recipes",
        "zsh": "_tttjax_recipes",
        "fish": "(_tttjax_recipes)",
        "preamble": {
            "bash": _BASH_RECIPES.replace("RECIPES", recipes).replace("NAMES", files),
            "zsh": _ZSH_RECIPES.replace("RECIPES", recipes),
            "fish": _FISH_RECIPES.replace("RECIPES", recipes),
        },
    }


# The names first, since hundreds of recipes are too many to choose from.
_BASH_RECIPES = """
_tttjax_recipes() {
  case $1 in
    *:*) compgen -W 'RECIPES' -- "$1" ;;
    *) compgen -W 'NAMES' -- "$1"; compgen -f -X '!*.py' -- "$1"; compgen -d -S / -- "$1" ;;
  esac
}
"""
_ZSH_RECIPES = """
_tttjax_recipes() {
  local -a recipes=(RECIPES)
  _alternative 'recipes:recipe:_multi_parts : recipes' 'files:experiment file:_files -g "*.py"'
}
"""
_FISH_RECIPES = """
function _tttjax_recipes
  string split ' ' 'RECIPES'
  __fish_complete_suffix .py
end
"""
# shtab completes `--flag value`. Bash hands over `--flag=a:b` as the words `--flag`, `=`, `a`, `:`,
# `b`, of which a completion replaces the last; this makes them `--flag` and `a:b`, and cuts `a:`
# off what comes back. Of a configuration's fields nothing is offered before `--config.` is written.
_BASH_WRAPPER = r"""

_tttjax() {
  local -a words=()
  local i word joined=false current last
  for ((i = 0; i <= COMP_CWORD; i++)); do
    word=${COMP_WORDS[i]}
    if [[ $word == '=' && i -gt 0 ]]; then
      (( i == COMP_CWORD )) && words+=("")
    elif [[ $word == ':' || $joined == true ]]; then
      words[${#words[@]}-1]+=$word
      [[ $word == ':' ]] && joined=true || joined=false
    else
      words+=("$word")
    fi
  done
  local COMP_CWORD=$(( ${#words[@]} - 1 ))
  local -a COMP_WORDS=("${words[@]}")
  current=${words[COMP_CWORD]}
  _shtab_tttjax
  if [[ $current == -* && $current != --config.* ]]; then
    for i in "${!COMPREPLY[@]}"; do
      [[ ${COMPREPLY[i]} == --config.* ]] && unset "COMPREPLY[i]"
    done
    COMPREPLY=("${COMPREPLY[@]}")
  fi
  if [[ $current == *:* && $COMP_WORDBREAKS == *:* ]]; then
    COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*:}"}"}")
  fi
  last=${COMPREPLY[0]-}
  [[ ${#COMPREPLY[@]} == 1 && $last == *[:/] ]] && compopt -o nospace 2>/dev/null
  return 0
}
complete -o bashdefault -F _tttjax tttjax"""
