"""Prometheus metrics: every one of them in ``registry``, and the collector that reads what ranks wrote."""
