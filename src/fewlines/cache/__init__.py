"""What is retained: budgets, policies, and the plan that enforces them."""
