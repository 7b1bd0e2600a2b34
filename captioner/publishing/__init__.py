"""From machine captions to texts that people publish: alt texts, their review, their exports."""
