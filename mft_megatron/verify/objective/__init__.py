"""The objective and its gradients on a user's layout against Eq. 1 written out, sample by sample, in one process."""
