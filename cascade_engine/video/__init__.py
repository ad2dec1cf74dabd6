"""From video files to arrays: decoding, views, indexes of labelled videos, the clip cache, clips and augmentation."""
