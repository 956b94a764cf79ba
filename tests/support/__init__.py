"""Helpers that tests of several directories share; helpers of one directory are beside its tests."""
