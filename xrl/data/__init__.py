"""Prompts in: conversion, reading, tokenising and packing."""
