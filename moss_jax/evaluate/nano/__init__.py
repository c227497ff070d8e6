"""How good is nano? An independent recogniser with a closed grammar, frozen items, and a report with its controls."""
