"""Turn machine captions into published texts: alt texts, their review and their exports."""
