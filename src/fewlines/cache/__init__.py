"""What stays resident: budgets, policies, and the plan that enforces them."""
