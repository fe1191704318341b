"""From a signal to named numbers, and from numbers to text and questions."""
