"""Requests and answers of the API: fields, endpoints, forms of JSON."""
