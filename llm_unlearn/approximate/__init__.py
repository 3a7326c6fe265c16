"""Approximate unlearning: one trainer over forget and retain data, one file for each method."""
