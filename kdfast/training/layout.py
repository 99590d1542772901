"""What whoever writes a run folder and whoever reads it agree on."""

# Of the folder: what lies where, and what `args.yaml` means.
LAYOUT = 1
# What a resumed run may change, and its weights do not depend on; all else it must share with the
# run it goes on with. The teacher is known by its checksum, wherever it lies,
# and so are its heads.
FREE = {
    "output", "experiment", "resume", "recipe", "epochs", "save-epochs", "checkpoint-hist",
    "checkpoint-steps", "log-interval", "profile", "workers", "threads", "data-dir", "download",
    "baseline", "amp", "teacher-checkpoint", "teacher-epochs", "heads", "cache-images",
    "on-device", "feature-dir", "teacher-ahead", "teacher-cache",
    "classifier-epochs", "classifier-lr",
}  # fmt: skip
