"""Runs any bulk job: plan, process, commit, resume, audit. This folder must not know images or Gaussians."""
