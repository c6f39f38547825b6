"""How every bulk job runs: plan, process, commit, resume, audit. It knows nothing of images or Gaussians."""
