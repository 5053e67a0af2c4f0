"""`python -m rlaif_jax TOOL`: the tools on the command line."""

from __future__ import annotations

import sys

import rlaif_jax

TOOLS = """\
usage: python -m rlaif_jax TOOL [options]

  train             improve your own model on your own prompts by feedback
  sft               fine-tune a language model on conversations, answers to prompts, or texts
  reward-model      train a reward model on comparisons, rankings or ratings of answers
  generate          answer prompts by a model or the policy of a run, or by two side by side
  export            write the policy of a run as a Hugging Face folder, or its adapter for peft
  report            write the page of a run again, or one page that compares several runs
  judge             ask a model behind an API about answers, or report how good the feedback in a store is
  annotate          serve the page on which people annotate
  import-feedback   add the feedback in files of other tools and data sets to a store
  export-feedback   write the feedback of a store in the format of another tool

`python -m rlaif_jax TOOL --help` lists a tool's options, `python -m rlaif_jax --version` prints the version.
"""


def train() -> None:
    """Trains a user's model by feedback; exits with 1 if it became worse."""
    from rlaif_jax.progress.startup import Loading

    loading = Loading()
    from rlaif_jax.command_line import command_line, ended_worse
    from rlaif_jax.recipes import rlaif

    command_line(
        rlaif.main,
        rlaif.get_config(),
        rlaif.help_text(),
        loading=loading,
        failed=ended_worse,
        pages=rlaif.PAGES,
        named=rlaif.NAMED_SETTINGS,
    )


def sft() -> None:
    """Fine-tunes a language model."""
    from rlaif_jax.progress.startup import Loading

    loading = Loading()
    from rlaif_jax.command_line import command_line
    from rlaif_jax.recipes import sft as recipe

    command_line(recipe.main, recipe.SFTConfig(), recipe.help_text(), loading=loading)


def reward_model() -> None:
    """Trains a reward model."""
    from rlaif_jax.progress.startup import Loading

    loading = Loading()
    from rlaif_jax.command_line import command_line
    from rlaif_jax.recipes import reward_model as recipe

    command_line(recipe.main, recipe.RewardModelConfig(), recipe.help_text(), loading=loading)


def generate() -> None:
    """Answers prompts by a model or by the policy of a run."""
    from rlaif_jax.progress.startup import Loading

    loading = Loading()
    from rlaif_jax.command_line import command_line
    from rlaif_jax.tools import generate as answers

    command_line(answers.main, answers.GenerateConfig(), answers.help_text(), loading=loading)


def export() -> None:
    """Writes the policy of a run as a Hugging Face folder, or its adapter for peft."""
    from rlaif_jax.progress.startup import Loading

    loading = Loading()
    from rlaif_jax.command_line import command_line
    from rlaif_jax.tools import export as policies

    command_line(policies.main, policies.ExportConfig(), policies.help_text(), loading=loading)


def report() -> None:
    """Writes the page of a run again, or one page that compares several runs."""
    from rlaif_jax.command_line import command_line
    from rlaif_jax.tools import pages

    command_line(pages.main, pages.PagesConfig(), pages.help_text())


def judge() -> None:
    """Asks a judge behind an API about answers; exits with 1 if a judgement is missing."""
    from rlaif_jax.command_line import command_line
    from rlaif_jax.feedback.api import command as judge_tool

    def run(config: judge_tool.JudgeConfig) -> None:
        missing = judge_tool.main(config)
        if config.report and not config.show_template:
            from rlaif_jax.quality.quality import quality_of_store
            from rlaif_jax.quality.text import quality_text

            print(quality_text(quality_of_store(config.store)))
        if missing:
            sys.exit(1)

    command_line(run, judge_tool.JudgeConfig(), judge_tool.help_text())


def annotate() -> None:
    """Serves the annotation page."""
    from rlaif_jax.command_line import command_line
    from rlaif_jax.ui import annotate as page

    command_line(page.main, page.AnnotateConfig(), page.help_text())


def import_feedback() -> None:
    """Adds feedback of other tools to a store; exits with 1 if something of a file was faulty."""
    from rlaif_jax.command_line import command_line
    from rlaif_jax.feedback.records import exchange

    command_line(exchange.import_feedback, exchange.ImportConfig(), exchange.import_help(), failed=bool)


def export_feedback() -> None:
    """Writes the feedback of a store in the format of another tool."""
    from rlaif_jax.command_line import command_line
    from rlaif_jax.feedback.records import exchange

    command_line(exchange.export_feedback, exchange.ExportConfig(), exchange.export_help())


def tool(arguments: list[str]) -> None:
    """Runs the tool that the first argument names, with the other arguments.

    For an unknown name it prints the list of tools and exits with status 2.
    """
    name = arguments[0] if arguments else ""
    sys.argv = [f"python -m rlaif_jax {name}", *arguments[1:]]
    if name == "train":
        train()
    elif name == "sft":
        sft()
    elif name == "reward-model":
        reward_model()
    elif name == "generate":
        generate()
    elif name == "export":
        export()
    elif name == "report":
        report()
    elif name == "judge":
        judge()
    elif name == "annotate":
        annotate()
    elif name == "import-feedback":
        import_feedback()
    elif name == "export-feedback":
        export_feedback()
    elif name in ("", "-h", "--help"):
        print(TOOLS, end="")
    elif name == "--version":
        print(f"rlaif-jax {rlaif_jax.__version__}")
    else:
        print(f"error: there is no tool {name!r}\n\n{TOOLS}", end="", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    """Runs the tool that the command line names; `rlaif-jax` calls this function."""
    tool(sys.argv[1:])


if __name__ == "__main__":
    main()
