"""Processes, errors and files: what every script stands on."""

from cpu.threads import let_threads_sleep

let_threads_sleep()  # it acts where torch is imported later: in training, sampling, expert_data.py
