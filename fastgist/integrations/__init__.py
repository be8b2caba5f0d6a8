"""Adapters to other libraries. Each module is imported only when a model of that library is met."""
