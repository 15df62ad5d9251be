"""Whose a place is: markers, temporaries that name their process, locks."""
