"""`python -m pmd completion SHELL`: a script that completes commands, keys and files in bash or zsh."""

from pmd.cli.arguments import make_parser
from pmd.config.schema import RunConfig
from pmd.config.values import all_keys

DESCRIPTION = """Print a script with which a shell completes commands, configuration keys and files.

  python -m pmd completion bash > ~/.local/share/bash-completion/completions/pmd
  python -m pmd completion zsh >> ~/.zshrc

It completes the command `pmd`, which the package installs."""
#: `compgen` filters by what is typed; a key gets its `=` and no space after it.
SCRIPT = """\
_pmd() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    elif [ "$before" = "--config" ] || [ "${{word#--}}" = "$word" ]; then
        COMPREPLY=($(compgen -f -- "$word"))
    else
        COMPREPLY=($(compgen -W "--config --help {keys}" -- "$word"))
        [ "${{COMPREPLY[0]%=}}" = "${{COMPREPLY[0]}}" ] || compopt -o nospace
    fi
}}
complete -o filenames -F _pmd pmd
"""


def main(argv: list[str]) -> int:
    """Print the script; return 0."""
    from pmd.cli import COMMANDS, TRAINING

    parser = make_parser("completion", DESCRIPTION)
    parser.add_argument("shell", choices=["bash", "zsh"])
    arguments = parser.parse_args(argv)
    keys = " ".join(f"--{key}=" for key in all_keys(RunConfig))
    script = SCRIPT.format(commands=" ".join(sorted({*TRAINING, *COMMANDS})), keys=keys)
    if arguments.shell == "zsh":
        script = "autoload -U +X bashcompinit && bashcompinit\n" + script
    print(script, end="")
    return 0
