"""Run the command line as `python -m peft_recipes`, also under `accelerate launch -m peft_recipes`."""

from peft_recipes.cli.app import app

if __name__ == "__main__":
    app(prog_name="peft-recipes")
