"""The guards by name, and what each looks for. All are on but those that a recipe's `skip_checks` names."""

GUARDS = {
    "memory": "an arm whose estimated peak is beyond the machine's memory is refused before the start",
}
