"""What the offline goal-conditioned agents share: inputs, networks, losses, presets, and one loop of updates."""
