"""rsm-engine as users get it: the wheel, its extras, the image."""
