"""Tables, figures and the report, from what the instruments wrote."""
