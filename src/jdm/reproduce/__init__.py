"""`jdm reproduce`: the paper's tables and figures, filled cell by cell, beside the published ones."""
