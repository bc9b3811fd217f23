"""`python -m peft_recipes`, and so `accelerate launch -m peft_recipes`."""

from peft_recipes.cli.app import app

if __name__ == "__main__":
    app(prog_name="peft-recipes")
