"""Thin edges over the services: gRPC for callers, HTTP for the kubelet and Prometheus."""
