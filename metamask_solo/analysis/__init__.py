"""What a trained mask did to a representation: measures, figures and a report."""
