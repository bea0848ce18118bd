"""What stays resident: budgets, policies, and the bounded buffer that enforces them."""
