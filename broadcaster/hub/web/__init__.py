"""What a hub serves to browsers: the JavaScript client and the live page, as they are."""
