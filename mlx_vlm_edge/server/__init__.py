"""The HTTP API and its page: requests that existing clients send in, answers streaming out.

A request is checked whole before anything is decoded; one engine answers all of them.
"""
