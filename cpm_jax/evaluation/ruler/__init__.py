"""Questions about long texts: whether a model finds, follows and counts what lies far back."""
