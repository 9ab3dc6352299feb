"""What agent and collector must agree on: statistics, frames, manifests, and their encoding."""
