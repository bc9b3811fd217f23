"""What a recipe's base is and how it computes: its weights, quantised ones, its modules, faster kernels."""
