"""How far a cut changes the tangent kernel."""
