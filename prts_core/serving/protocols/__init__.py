"""Speak to robots: one module a protocol, all of them over the one service (prts_core/serving/service.py).

A protocol turns messages into Observations and Replies into messages. It knows neither weights nor batches.
"""
