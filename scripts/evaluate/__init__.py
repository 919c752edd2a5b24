"""What compressing, dropping and annotating KV caches costs and saves on question-answering sets."""
