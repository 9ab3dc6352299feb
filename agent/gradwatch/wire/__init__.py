"""What agent and collector must agree on: the statistics, the frame and the manifest."""
