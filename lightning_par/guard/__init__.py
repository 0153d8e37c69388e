"""What ends a run before it goes wrong unseen: numbers that are not finite, copies that are no longer the same."""
