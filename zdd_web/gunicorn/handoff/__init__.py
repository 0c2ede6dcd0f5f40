"""What one generation gives to the next: the channel, the inheritance, and how a successor is launched."""
