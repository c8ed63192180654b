"""What adapters of stock inference engines share: the front of a server, a worker whose calls never raise, and checks of its model."""
